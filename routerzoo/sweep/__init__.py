"""Sweeps: a grid of runs that finishes, resumes and explains itself.

`plan` says what is to be run, `ledger` what has been, `work` does one run, the engines do many, `progress` shows them.
`routerzoo.report` reads what came of it.
"""
