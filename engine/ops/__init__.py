"""Operations on a repository: each file is one thing a user asks for."""
