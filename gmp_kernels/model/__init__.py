"""The model as the pruner sees it: its weights, their names and roles, and which of them are pruned by default."""
