"""The tables of README.md and docs, made from the committed results, so that they cannot drift."""
