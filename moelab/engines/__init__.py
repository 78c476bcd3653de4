"""moelab's layer inside serving engines, as plugins that the engines load themselves: `sglang` and `vllm`, over one `checks`.

An engine finds them by the entry points of the installed package; docs/engines.md says how to run and compare them.
"""
