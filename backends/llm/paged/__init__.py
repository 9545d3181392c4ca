"""The embedded engine: paged KV cache, prefix tree, continuous batching. Import `.backend` where a model is wanted."""
