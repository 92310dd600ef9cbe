"""The study of the paper: profiles, runs, claims and their ledger, the longer experiments."""
