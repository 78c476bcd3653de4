"""The tuner: which kernel config is fastest for a layer, on this device or replayed from a recording of one.

problem (what is tuned) -> space (the grid, pruned) -> strategies (what to try next) -> evaluate (who tries it: a GPU, or
replay of a recorded landscape) -> journal (every sample, append-only) -> session (all of it together, resumable) ->
results (winners, gains, config files). Strategies never know who evaluates.
"""
