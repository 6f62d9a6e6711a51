"""Files of several formats to texts: plain text and Markdown, and with the extra `formats` HTML, PDF and docx."""
