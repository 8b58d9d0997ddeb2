"""A gradient becomes a better student and teacher."""
