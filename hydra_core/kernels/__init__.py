"""Native code: C++ for CPUs (`ops.py`, compiled by `library.py`) and Triton kernels for GPUs (`triton.py`)."""
