"""Other people's data: their files, formats and columns, read into our tables."""
