"""Statistics over seeds: one method a module, on numbers alone.

A failed run is NaN, and counts as the worst. `comparisons` decides; `aggregates` and `ranks` describe; `power` plans.
"""
