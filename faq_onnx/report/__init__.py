"""What people read: progress, tables, the summary page. No decisions and no files here."""
