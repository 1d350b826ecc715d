"""`make bench-peers`: this server and its peers, on the same weights and under the same load."""
