"""The study of the paper: profiles, training of all seeds, claims, their ledger, the runner."""
