"""``fastdino bench RECIPE``: how fast a recipe trains here, where its time goes, and what each switch gives."""
