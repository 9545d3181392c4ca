"""Triton kernels: paged attention, writes into the KV cache, copies of whole blocks, and the scan of index pages.

Each module holds one operation three times: the kernel, a reference in torch that says what it computes, and a function
that launches it. They are written to the Triton 3.6 subset and run in three ways: compiled for the device, compiled for
a device that is not there (`python -m flowc.backends.kernels.aot`), and interpreted on the CPU (`TRITON_INTERPRET=1`
in the environment before triton is imported). Importing a module here imports torch and triton; this package alone
imports nothing.
"""
