"""Sampling, batched and streamed decoding with a key/value cache, scoring: for evaluation, web demo and server."""
