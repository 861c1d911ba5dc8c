"""llama2.c and KuiperLLama files."""
