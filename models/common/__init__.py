"""What is not one model's own: attention, KV cache, experts, folders, adapters."""
