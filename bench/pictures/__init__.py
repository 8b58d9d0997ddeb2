"""Pictures of the result files: charts, and a page of them."""
