"""Names and roles of a model's weights, and the choice of those to prune."""
