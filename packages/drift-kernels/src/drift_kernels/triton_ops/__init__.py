"""The ops as Triton kernels for NVIDIA devices from compute capability 8.0 on, verified without one.

`plan` and `tiles` are plain Python and numpy; `device_*` hold what runs on the device, in Triton's language, and
the module of the same name without the prefix its launchers. Launchers allocate nothing: outputs and scratch are
arguments, and so is `num_sms`, the multiprocessors of the lane's partition. `docs/kernels.md` has the numbers.

Importing this package imports neither torch nor Triton.
"""
