"""What a notebook and a terminal show of models, graphs, plans, files and profiles: HTML, and tables of text."""
