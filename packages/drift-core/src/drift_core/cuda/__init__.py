"""The CUDA executor: both phases on streams of one GPU, decode as captured graphs, nothing ever waited for on
the host.

`device` is the seam: everything here runs as well on `stub.StubDevice`, which keeps virtual time and watches
for missing order, shared scratch, late allocation and misplaced work. Importing this package imports no
torch.
"""
