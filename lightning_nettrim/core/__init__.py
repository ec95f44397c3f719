"""The pruning problem of one layer: data, formulas, certificates, proximal maps and sparsity patterns."""
