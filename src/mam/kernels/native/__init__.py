"""CPU kernels in C++ (the package in native/), called through XLA's foreign function interface."""
