"""Losses and runs as text: a table for people, JSON for programs, Markdown for papers and issues."""
