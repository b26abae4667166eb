"""SAEs in other projects' folders: heads of ours written there, theirs read as heads of ours."""
