"""A whole model on one GPU: what its experts' implementation is worth in a first token, a next one, and tokens a second.

`moelab serve-bench` runs `suite.serve_bench`. A model of a config.json's sizes and random weights is made once (`model`); the
contenders are names of transformers' ExpertsInterface, moelab's among them (`contenders`), and take turns in it.
"""
