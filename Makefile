# make quickstart   train a model from nothing on the sample data, then ask it questions (CPU is enough)
# make test         run the tests
# make install      only the environment in .venv         make lint, make clean
#
# Every recipe is made of plain commands that work by themselves; on Windows run them from the README.

PYTHON ?= python3

# PyPI's Linux wheels of torch carry CUDA (several GB). Without an NVIDIA GPU, PyTorch's own index of CPU wheels is used
# where it can be reached. Override: make install PIP_FLAGS="--index-url https://my.mirror/simple"
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP_FLAGS ?= $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null \
	&& $(PYTHON) -c "import urllib.request as u; u.urlopen('$(TORCH_CPU_INDEX)/torch/', timeout=5)" 2>/dev/null \
	&& echo --extra-index-url $(TORCH_CPU_INDEX))

.PHONY: quickstart install test lint clean

quickstart: install
	.venv/bin/python train_pretrain.py --data_path dataset/sample/pretrain.jsonl --dim 256 --n_layers 4 --dtype float32 --epochs 4 --batch_size 64 --accumulation_steps 1 --learning_rate 2e-3 --warmup_iters 20 --max_seq_len 256 --out_dir out/quickstart
	.venv/bin/python train_full_sft.py --data_path dataset/sample/sft.jsonl --dim 256 --n_layers 4 --dtype float32 --epochs 3 --batch_size 32 --learning_rate 2e-3 --warmup_iters 20 --max_seq_len 256 --out_dir out/quickstart
	.venv/bin/python eval_model.py --dim 256 --n_layers 4 --out_dir out/quickstart --temperature 0 --prompt "你是谁？" --prompt "法国的首都是哪里？" --prompt "卡鲁比王国的首都是哪里？" --prompt "What is the chemical symbol of gold?"
	@echo
	@echo "接着和它聊天 / go on talking to it:"
	@echo "    .venv/bin/python eval_model.py --dim 256 --n_layers 4 --out_dir out/quickstart"
	@echo
	.venv/bin/python eval_model.py --dim 256 --n_layers 4 --out_dir out/quickstart --score dataset/sample/heldout.jsonl dataset/sample/unanswerable_heldout.jsonl

install: .venv/.installed

test: .venv/.installed-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf .venv out/quickstart .pytest_cache .ruff_cache .hypothesis

.venv/bin/pip:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
		{ echo "error: $(PYTHON) is missing or older than 3.10. Install Python 3.10 or newer, or name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c "import venv, ensurepip" || \
		{ echo "error: $(PYTHON) cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/pip requirements.txt constraints.txt
	.venv/bin/python -m pip install $(PIP_FLAGS) -r requirements.txt -c constraints.txt
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	.venv/bin/python -m pip install $(PIP_FLAGS) -r requirements-dev.txt -c constraints.txt
	@touch $@
