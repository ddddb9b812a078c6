"""Check that the installed code does what the privacy accounting assumes: `fedqc verify --privacy`.

Each check runs the real functions of `client.dp` and `client.agent` on generated patients, measures, and
compares with what a plan promises. Passing is regression evidence: it finds faults of the kinds that were
thought of (tests/client/privacy_checks/test_breakages.py lists them), and proves nothing.
"""
