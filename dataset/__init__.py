"""From jsonl files to batches: `readers` checks lines, `token_cache` tokenises once, `batching` plans and collates."""
