"""Speed, memory, and where the time of a step goes."""
