"""One matrix or one block: from dense numbers to codes and codebooks."""
