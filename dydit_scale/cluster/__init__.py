"""Jobs for clusters: rendered from one typed description, validated, and supervised on each node."""
