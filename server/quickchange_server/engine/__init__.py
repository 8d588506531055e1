"""The engine room: requests, scheduler, KV blocks, model runner, sampler."""
