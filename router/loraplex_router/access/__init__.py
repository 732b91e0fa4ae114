"""Who may do what: API keys, their tenants and limits, and the audit log."""
