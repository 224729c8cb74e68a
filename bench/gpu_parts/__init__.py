"""Parts of `bench/gpu.py`, one module each with `ESTIMATE` (quick and full seconds) and `run(options) ->
Findings`."""
