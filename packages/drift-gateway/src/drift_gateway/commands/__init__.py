"""The commands of `drift` that this package brings: option parsing only, what they do loads when they run."""
