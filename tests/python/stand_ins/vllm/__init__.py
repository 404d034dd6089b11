"""A stand-in for vLLM: what a loader touches of it, done in few lines. tools/vllm_generate.sh runs the real one."""
