//! Image archives, as `tools/pack-image` makes them.

use std::process::Command;

/// The archive of a folder with a program and a `/tmp`, all of it made under
/// `umask`.
fn packed(umask: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let script = r#"
        umask "$1" && mkdir -p root/bin root/tmp && chmod 1777 root/tmp
        echo program > root/bin/program && chmod +x root/bin/program && echo text > root/text
        "$2" root example.test/image:1 '{}' image.tar"#;
    let pack = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/pack-image");
    let output = Command::new("bash")
        .args(["-ec", script, "pack", umask, pack])
        .current_dir(&folder)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    std::fs::read(folder.path().join("image.tar")).unwrap()
}

/// Mode and name of what is in the layer of `archive`.
fn modes(archive: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("image.tar"), archive).unwrap();
    let output = Command::new("bash")
        .args([
            "-c",
            "tar -xf image.tar ./layer.tar && tar -tvf layer.tar | awk '{ print $1, $NF }'",
        ])
        .current_dir(&folder)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn archives_do_not_depend_on_the_umask() {
    let usual = packed("022");
    let wanted = "drwxr-xr-x ./\n\
                  drwxr-xr-x ./bin/\n\
                  -rwxr-xr-x ./bin/program\n\
                  -rw-r--r-- ./text\n\
                  drwxrwxrwt ./tmp/\n";
    assert_eq!(modes(&usual), wanted);
    assert!(packed("077") == usual, "{}", modes(&packed("077")));
    assert!(packed("002") == usual, "{}", modes(&packed("002")));
}
