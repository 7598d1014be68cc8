"""The report of a run and the comparison of runs: figures, contact sheets, sentences and pages."""
