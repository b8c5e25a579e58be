"""From jsonl files to batches: `readers`, `tokenizing`, `token_cache`, `batching`, in this order; see README.md."""
