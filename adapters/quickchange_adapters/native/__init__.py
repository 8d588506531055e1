"""The engine's hand-written kernels for CPUs with AVX-512 BF16, built here by the C++ compiler."""
