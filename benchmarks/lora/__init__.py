"""The lora family's figures beside its speed: what ``bench_lora.py`` gathers for ``bars.toml``."""
