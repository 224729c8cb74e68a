"""Who may call, and over what: credentials, roles and limits of tenants, TLS. Knows nothing of what is asked."""
