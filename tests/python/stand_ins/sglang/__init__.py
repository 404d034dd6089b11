"""A stand-in for SGLang: what a loader touches of it, done in few lines. tools/sglang_load.sh runs the real one."""
