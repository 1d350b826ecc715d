"""What a GPU does with a model of true size, against what it could do; `make bench-gpu`."""
