"""OpenAI's HTTP API, both ways: a sampler of ours behind it, and a sampler over whoever speaks it."""
