"""The commands of the program, a module each; `running` opens the repository and turns errors into exit codes."""
