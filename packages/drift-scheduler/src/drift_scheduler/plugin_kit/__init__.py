"""For authors of policies: `drift plugins new` writes a package, `drift plugins check` holds a policy to the rules."""
