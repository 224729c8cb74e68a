"""Everything needed to run the scheduler without a device: a counting KV and a simulated executor."""
